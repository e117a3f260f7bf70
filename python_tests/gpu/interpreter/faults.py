"""What a strict launch raises."""


class KernelFault(Exception):
    """The kernel did what is undefined on a GPU, or refused there.

    ``kind`` is "bounds", "misaligned", "race", "overflow" or "dot".
    """

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message}")
        self.kind = kind
