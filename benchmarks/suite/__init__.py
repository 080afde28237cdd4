"""Full-batch problems of the kinds that users of Rprop have, for ``benchmarks.profile``."""

from benchmarks.suite import inverse, models, networks, physics

CASES = {**networks.CASES, **physics.CASES, **models.CASES, **inverse.CASES}
