"""Where a model's memory and time go, and whether its quantized weights stay packed.

`profile(model, run)` for everything, `find_dequant(model, *inputs)` for the verdicts alone.
"""

from lowbit.tools.profile.find import find_dequant
from lowbit.tools.profile.recorder import Profiler
from lowbit.tools.profile.result import Profile, document
from lowbit.tools.profile.session import Files, profile
from lowbit.tools.profile.verdict import Verdict, Verdicts

__all__ = ["Files", "Profile", "Profiler", "Verdict", "Verdicts", "document", "find_dequant", "profile"]
