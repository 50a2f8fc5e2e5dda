"""SteerLM (arXiv 2310.05344) on Megatron-Core: attribute prediction, annotation, attribute-conditioned SFT,
bootstrapping.
"""

import warnings

__version__ = "0.1.0"

# Megatron-Core warns once per module that Apex and Transformer Engine are absent, and calls collectives by names that
# torch has since renamed. Here the first is the normal case, and the second is not for a user to change. The filters
# stand in this file because they have to be in force before any module imports Megatron-Core.
for _module in (
    r"megatron\..*",
    r"torch\.distributed\.c10d_logger",
    r"torch\.jit\._script",
    r"torch\.distributed\.checkpoint\..*",
):
    for _category in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=_category, module=_module)
del _module, _category
