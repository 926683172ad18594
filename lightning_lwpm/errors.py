"""The errors that the library raises on purpose."""


class LWPMError(RuntimeError):
    """Base of every error of this library, so that one ``except`` catches them all."""


class ConfigurationError(LWPMError, ValueError):
    """What the user asked for cannot be done; the message quotes it and says what to change."""


class PipelineError(LWPMError):
    """A rank failed while the pipeline ran; the message says which one, where and why."""
