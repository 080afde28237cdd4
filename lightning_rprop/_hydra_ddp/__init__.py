"""DDP in Hydra jobs: each job has one folder and one config on all ranks, and a failed job does not end the sweep.

``ddp.py`` is the context manager. ``rank.py`` starts the other ranks with the job's config, using the command line from
``command.py``; ``children.py`` waits for them and ends them.
"""

# Environment variable of a launched rank: the file descriptor from which the Hydra plugin reads the job's config.
RANK_FILE = "LIGHTNING_RPROP_RANK_FILE"
