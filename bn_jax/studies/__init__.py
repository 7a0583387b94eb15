"""Studies of batch normalization. Each asks one question, with the ordinary step and networks."""

from bn_jax.studies import group_size, init, landscape, noise, population, rates, shift
from bn_jax.studies.frame import Study

_MODULES = (population, group_size, landscape, shift, rates, init, noise)
STUDIES: dict[str, Study] = {module.STUDY.name: module.STUDY for module in _MODULES}
