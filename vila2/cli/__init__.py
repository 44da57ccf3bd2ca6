"""The command `vila2-fast`: one file a command, which parses, calls one function and prints. Nothing else prints."""
