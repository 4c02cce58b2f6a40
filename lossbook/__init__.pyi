# ruff: noqa: F403
# What type checkers and editors see of the lazy names in __init__.py.
from lossbook.accuracy import *
from lossbook.am_softmax import *
from lossbook.distributed import *
from lossbook.emo import *
from lossbook.focal import *
from lossbook.metrics import *
from lossbook.multilabel_softmax import *
from lossbook.soft_labels import *
from lossbook.spans import *

__version__: str
_EXPORTS: dict[str, str]
