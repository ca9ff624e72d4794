"""The command line: arguments, one library call, a table, a figure and a path. No science here."""
