"""From a plan to a checkpoint: schedulers that run jobs, the output and its commit, recovery, and what is swept."""
