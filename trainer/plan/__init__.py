"""What a run will need, before it is started: memory of each process, FLOPs and time.

meter      what ops on the meta device would allocate and compute
subject    the networks of a run on the meta device, whole and with fewer blocks
updates    the updates of a stage, run on the meta device under the meter
layout     what a process holds of it
machines   memory and speed of GPUs
plan       the sums, and what is said about them
"""
