"""For whoever measures: speed here, a card that is not here, a report of a card that is, PyTorch beside it; and, for
whoever looks, a trained model as one page."""
