"""The one error of this package."""


class QuantError(ValueError):
    """A recipe, model or machine that does not fit; the message says what was got, what was expected, what to do."""


__all__ = ["QuantError"]
