"""DDP in Hydra's jobs, where Lightning starts the ranks: one folder and one config a job, and no job ends another.

``running.py`` finds the job, ``rank.py`` starts its other ranks with exactly its config, ``children.py`` waits for them
and ends them, ``ddp.py`` is what a user sees.
"""
