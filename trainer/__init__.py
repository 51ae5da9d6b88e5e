"""Distillation of diffusion transformers with the tangents that `jvpgraph.transform` gives.

what runs        train (the loop), run (a finished run), demo, cli
where it runs    parallel (one process or many), ranks
what is trained  objectives/, times (where), noise, trigflow (coordinates, noise schedules), batch
networks         models (built from the settings), student (LoRA, checkpointing), adapters (diffusers), dit (digits)
data             data/
state            optim, ema, checkpoint, folder, files
settings         config (what there is), settings/, plug (how it is read), configs/ (ready ones)
looking at it    log, preview, watch (what is not finite), sample, evaluate, features
"""
