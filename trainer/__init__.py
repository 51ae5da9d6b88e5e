"""Distillation of diffusion transformers with the tangents that `jvpgraph.transform` gives.

what runs        train (the loop), cli, commands/ (what each command takes), demo
what is trained  objectives/, times (where), noise, trigflow (coordinates, noise schedules), batch
networks         model/: networks (built from the settings), adapters (diffusers), dit (digits), student, ema, optimizer
data             data/
a run            run/: folder, checkpoint, log, preview, parallel (one process or many), not_finite, finished
how good it is   evaluation/: samplers, distances, features
where it goes    export/: a file per format
settings         config (what there is), settings/ (how it is read), plug (functions of yours), configs/ (ready ones)

adapters, dit and features are here too, under the names that settings have for them.
"""
