"""DDP in Hydra jobs where Lightning starts the ranks: one folder and one config per job, and no job ends another.

``running.py`` finds the job, ``rank.py`` starts its other ranks with exactly its config, ``children.py`` waits for them
and ends them, ``ddp.py`` is the context manager, and ``_hydra.py`` holds the private names of Hydra.
"""

# In the environment of a rank: the file descriptor from which our Hydra plugin reads the job's config.
RANK_FILE = "LIGHTNING_RPROP_RANK_FILE"
