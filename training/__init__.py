"""The recipes of the embedded checkpoints: every stage from rendered scenes to what ships. Run `python -m training`.

Not part of the installed package. The parser and the exact masks judge what is trained here; by default they teach
nothing but the parser itself.
"""
