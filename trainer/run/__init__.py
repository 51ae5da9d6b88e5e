"""What a run is made of: its folder, checkpoints, log, processes; and what is made of a finished one."""
