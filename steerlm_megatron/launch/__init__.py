"""Starting the processes that a command runs in."""
