"""Distillation of diffusion transformers with the tangents that `jvpgraph.transform` gives.

what runs        train (the loop), cli, commands/ (what each command takes), demo
what is trained  objectives/, times (where), noise, trigflow (coordinates, noise schedules), batch
networks         model/: networks (built from the settings), adapters (diffusers), dit (digits), student, ema, optimizer
data             data/; prepare/ (shards from pictures, clips and prompts)
before a run     plan/ (memory, FLOPs, time), run/beforehand (what would go wrong later)
a run            run/: folder, checkpoint, kept (random streams), parallel (one process or many), not_finite, finished;
                 stopping, and going on: changes (settings), origin (files), start (from earlier weights);
                 earlier (students of other runs)
what it shows    run/: log, pace (speed, time left), compiling, preview, prompted (prompts of yours), validation
how good it is   evaluation/: samplers, phases (several students of one sample), distances, features, measures
where it goes    export/: a file per format; files, pictures
settings         config (what there is), settings/ (how it is read), ranges, plug (functions of yours), configs/
                 (ready ones)

adapters, dit, features and measures are here too, under the names that settings have for them.
"""
