"""The recipes that train what the package ships: every stage of the embedded checkpoints, from rendered scenes."""
