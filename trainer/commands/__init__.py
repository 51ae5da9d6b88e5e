"""What the commands of `jvpgraph` take and do: a module each, imported when the command is called."""
