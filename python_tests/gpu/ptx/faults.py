"""What goes wrong when a PTX program runs: faults of the program, and PTX that the emulator does not know."""

BOUNDS = "bounds"
MISALIGNED = "misaligned"
WILD_ADDRESS = "wild address"
READ_ONLY = "read-only"
RACE = "race"
BARRIER = "barrier"
IN_FLIGHT_READ = "in-flight read"
IN_FLIGHT_WRITE = "in-flight write"
PROXY = "proxy"
PARTIAL_WARP = "partial warp"
MBARRIER = "mbarrier"
TRAP = "trap"
LIMIT = "limit"


class PTXFault(Exception):
    """The program did what no correct program does.

    ``kind`` is one of the constants of this module; ``location`` the line of the kernel's source, ``line`` that of the
    PTX text, once the block that runs has filled them in.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.location = None
        self.line = None
        self.where = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}{self.where}"

    def locate(self, instruction, block_index) -> None:
        """Notes which instruction of which block committed the fault."""
        self.location = instruction.location
        self.line = instruction.line
        self.where = f"\n  at {instruction.location}, PTX line {instruction.line}: {instruction}  (block {block_index})"


class UnsupportedPTX(NotImplementedError):
    """An instruction, or a form of one, that the emulator does not implement: says nothing about the program."""
