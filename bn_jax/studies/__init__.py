"""Studies of batch normalization. Each asks one question, with the ordinary step and networks."""

from bn_jax.studies import group_size, init, landscape, noise, population, rates, shift
from bn_jax.studies.frame import Study

_ALL = (
    population.STUDY,
    group_size.STUDY,
    landscape.STUDY,
    shift.STUDY,
    rates.STUDY,
    init.STUDY,
    noise.STUDY,
)
STUDIES: dict[str, Study] = {study.name: study for study in _ALL}
