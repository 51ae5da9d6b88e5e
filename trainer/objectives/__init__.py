"""Training objectives, one file each: functions of (student, teacher, batch, rng) that return a loss."""
