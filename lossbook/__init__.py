"""Classification losses, derived, checked and measured: the package of the book *lossbook*.

Each chapter has one module of the same name, for example :mod:`lossbook.multilabel_softmax`. Import from there.
"""

__version__ = "0.1.0.dev0"
