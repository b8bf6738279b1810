"""What goes wrong with a backbone, said in words a user can act on."""


class BackboneError(RuntimeError):
    """A checkpoint that cannot be found, loaded or run; the message names it and the way out."""


class HubUnreachable(BackboneError):
    """A checkpoint that may be sound, but is neither in the cache nor to be had without a network."""
