"""mbarrier (sm_80 and up) and the forms of tcgen05 (sm_100) that a product of one block uses.

A product of tcgen05 is computed when it is issued. Until a thread has waited for the mbarrier that it was committed to,
reading its result and overwriting its operands are faults.
"""

from dataclasses import dataclass, field

import numpy as np

from ..faults import BOUNDS, IN_FLIGHT_READ, MBARRIER, PARTIAL_WARP, PTXFault, UnsupportedPTX
from ..operands import address, elements, reader, shared_address, writer
from .descriptors import element_addresses, read_matrix, values_of
from .registry import opcode

LANES = 32
TENSOR_LANES, TENSOR_COLUMNS = 128, 512
POISON = 0xFFFFFFFF
SWIZZLE_MODES = {0: 0, 2: 1, 4: 2, 6: 3}  # of a tcgen05 descriptor -> of a wgmma descriptor
UNORDERED = ("relinquish_alloc_permit", "dealloc", "wait", "fence")


@dataclass
class Barrier:
    """An mbarrier: how many arrivals complete a phase, how many are missing, how many phases are complete."""

    expected: int
    missing: int
    phases: int = 0


@dataclass
class Product:
    granules: np.ndarray
    columns: np.ndarray


@dataclass
class TensorUnit:
    """Tensor memory of one block and the products that fill it."""

    memory: np.ndarray = field(
        default_factory=lambda: np.full((TENSOR_LANES, TENSOR_COLUMNS), POISON, np.uint32)
    )  # [lanes, columns]
    uncommitted: list[Product] = field(default_factory=list)
    committed: dict[int, list[Product]] = field(default_factory=dict)  # address of the mbarrier -> products
    in_flight: np.ndarray = field(default_factory=lambda: np.zeros(TENSOR_COLUMNS, bool))

    def refresh(self, block) -> None:
        """Marks what the products in flight read and write."""
        left = [product for products in [self.uncommitted, *self.committed.values()] for product in products]
        block.shared.operand.fill(False)
        self.in_flight.fill(False)
        for product in left:
            block.shared.operand[product.granules] = True
            self.in_flight[product.columns] = True
        block.shared.any_operand = bool(left)


def _unit(block) -> TensorUnit:
    if "tensor" not in block.state:
        block.state["tensor"] = TensorUnit()
    return block.state["tensor"]


def _barriers(block) -> dict[int, Barrier]:
    return block.state.setdefault("mbarrier", {})


def _barrier(block, place: int) -> Barrier:
    if place not in _barriers(block):
        raise PTXFault(MBARRIER, f"no mbarrier was initialised at shared memory offset {place}")
    return _barriers(block)[place]


def _first(mask) -> int:
    return 0 if mask is None else int(np.argmax(mask))


def arrive(block, place: int, count: int = 1) -> None:
    barrier = _barrier(block, place)
    if count > barrier.missing:
        raise PTXFault(MBARRIER, f"{count} arrivals where {barrier.missing} are missing")
    barrier.missing -= count
    if barrier.missing == 0:
        barrier.missing = barrier.expected
        barrier.phases += 1


@opcode("mbarrier")
def decode_mbarrier(block, instruction):
    decode = {
        "init": _init,
        "inval": _invalidate,
        "try_wait": _wait,
        "test_wait": _wait,
        "arrive": _arrive,
    }.get(instruction.opcode[1])
    if decode is None:
        raise UnsupportedPTX(f"mbarrier.{instruction.opcode[1]}")
    return decode(block, instruction)


def _init(block, instruction):
    where, expected = shared_address(block, instruction.operands[0]), reader(block, instruction.operands[1], "u32")

    def execute(mask):
        thread = _first(mask)
        count = int(expected()[thread])
        _barriers(block)[int(where()[thread])] = Barrier(count, count)

    return execute


def _invalidate(block, instruction):
    where = shared_address(block, instruction.operands[0])

    def execute(mask):
        place = int(where()[_first(mask)])
        _barrier(block, place)
        del _barriers(block)[place]

    return execute


def _wait(block, instruction):
    """True once the phase of the given parity is complete."""
    if "parity" not in instruction.opcode:
        raise UnsupportedPTX("a wait by state, wanted .parity")
    write = writer(block, instruction.operands[0], "pred")
    where, parity = shared_address(block, instruction.operands[1]), reader(block, instruction.operands[2], "u32")

    def execute(mask):
        thread = _first(mask)
        place = int(where()[thread])
        is_complete = (_barrier(block, place).phases & 1) != (int(parity()[thread]) & 1)
        if is_complete and "tensor" in block.state and _unit(block).committed.pop(place, None):
            _unit(block).refresh(block)
        write(np.full(block.num_threads, is_complete), mask)

    return execute


def _arrive(block, instruction):
    if set(instruction.opcode[2:]) & {"expect_tx", "noComplete"}:
        raise UnsupportedPTX("arrivals of bulk copies")
    text = next(operand for operand in instruction.operands if operand.startswith("["))
    where = shared_address(block, text)

    def execute(mask):
        count = block.num_threads if mask is None else int(mask.sum())
        arrive(block, int(where()[_first(mask)]), count)

    return execute


@opcode("tcgen05")
def decode_tcgen05(block, instruction):
    what = instruction.opcode[1].split("::")[0]
    if what in UNORDERED:
        return lambda mask: None
    if "cta_group::2" in instruction.opcode:
        raise UnsupportedPTX("products of two blocks")
    decode = {"alloc": _allocate, "commit": _commit, "ld": _load, "st": _store, "mma": _mma}.get(what)
    if decode is None:
        raise UnsupportedPTX(f"tcgen05.{what}")
    return decode(block, instruction)


def _allocate(block, instruction):
    """The address of the tensor memory, which is 0, into shared memory."""
    where = shared_address(block, instruction.operands[0])

    def execute(mask):
        thread = _first(mask)
        place = where()[thread : thread + 1]
        block.shared.store(place, block.threads[thread : thread + 1], np.zeros((1, 1), np.uint32))

    return execute


def _commit(block, instruction):
    where = shared_address(block, instruction.operands[0])

    def execute(mask):
        place = int(where()[_first(mask)])
        unit = _unit(block)
        unit.committed.setdefault(place, []).extend(unit.uncommitted)
        unit.uncommitted = []
        arrive(block, place)

    return execute


def _places(block, instruction, text, offset_text):
    """A function: (warp, register number) -> (lanes, columns) of tensor memory."""
    where = address(block, text)
    offset = int(offset_text, 0) if "16x32bx2" in instruction.opcode else 0
    if not {"32x32b", "16x32bx2"} & set(instruction.opcode):
        raise UnsupportedPTX("shape of an access to tensor memory")

    def places(warp, number):
        first = int(where()[warp * LANES]) & 0xFFFFFFFF
        row, column, lane = first >> 16, (first & 0xFFFF) + number, np.arange(LANES)
        if "32x32b" in instruction.opcode:
            rows, columns = row + lane, np.full(LANES, column)
        else:
            rows, columns = row + lane % 16, column + offset * (lane // 16)
        if (rows // LANES != warp % 4).any():
            raise PTXFault(BOUNDS, f"warp {warp} accesses lanes of tensor memory that belong to another warp")
        if columns.max() >= TENSOR_COLUMNS:
            raise PTXFault(BOUNDS, f"tensor memory column {columns.max()} of {TENSOR_COLUMNS}")
        return rows, columns

    return places


def _load(block, instruction):
    names = elements(instruction.operands[0])
    offset = instruction.operands[2] if len(instruction.operands) > 2 else "0"
    places = _places(block, instruction, instruction.operands[1], offset)

    def execute(mask):
        unit = _unit(block)
        for warp in block.full_warps(mask, "tcgen05.ld"):
            threads = slice(LANES * warp, LANES * (warp + 1))
            for number, name in enumerate(names):
                rows, columns = places(warp, number)
                if block.shared.check_races and unit.in_flight[columns].any():
                    raise PTXFault(IN_FLIGHT_READ, "tensor memory is read before its product was waited for")
                block.registers[name][threads] = unit.memory[rows, columns]

    return execute


def _store(block, instruction):
    text = next(operand for operand in instruction.operands if operand.startswith("{"))
    reads = [reader(block, name, "b32") for name in elements(text)]
    places = _places(block, instruction, instruction.operands[0], instruction.operands[1])

    def execute(mask):
        unit = _unit(block)
        for warp in block.full_warps(mask, "tcgen05.st"):
            for number, read in enumerate(reads):
                unit.memory[places(warp, number)] = read()[LANES * warp : LANES * (warp + 1)]

    return execute


def _mma(block, instruction):
    """D in tensor memory = A B + D; A there or in shared memory, B in shared memory."""
    is_tf32 = "kind::tf32" in instruction.opcode
    if not is_tf32 and "kind::f16" not in instruction.opcode:
        raise UnsupportedPTX("kind of the product")
    text_d, text_a, text_b, text_shape, text_accumulates = instruction.operands[:5]
    where_d, read_b = address(block, text_d), reader(block, text_b, "b64")
    a_in_tensor_memory = text_a.startswith("[")
    read_a = address(block, text_a) if a_in_tensor_memory else reader(block, text_a, "b64")
    read_shape, accumulates = reader(block, text_shape, "u32"), reader(block, text_accumulates, "pred")

    def execute(mask):
        if mask is None or mask.sum() != 1:
            raise PTXFault(PARTIAL_WARP, "tcgen05.mma wants exactly one thread")
        thread, unit = _first(mask), _unit(block)
        shape = _Shape(int(read_shape()[thread]), is_tf32)
        if a_in_tensor_memory:
            a, granules = shape.from_tensor_memory(unit.memory, int(read_a()[thread])), np.zeros(0, np.int64)
        else:
            a, granules = shape.from_shared(
                block.shared, int(read_a()[thread]), shape.m, shape.type_a, shape.a_transposed
            )
        b, granules_b = shape.from_shared(
            block.shared, int(read_b()[thread]), shape.n, shape.type_b, shape.b_transposed
        )
        columns = (int(where_d()[thread]) & 0xFFFF) + np.arange(shape.n)
        place = shape.lanes()[:, None], columns[None, :]
        total = a @ b.T
        if accumulates()[thread]:
            total = total + unit.memory[place].view(np.float32)
        unit.memory[place] = total.astype(np.float32).view(np.uint32)
        unit.uncommitted.append(Product(np.concatenate([granules, granules_b]), columns))
        unit.refresh(block)

    return execute


class _Shape:
    """What the instruction descriptor of a product says."""

    def __init__(self, descriptor: int, is_tf32: bool):
        self.n, self.m = (descriptor >> 17 & 63) * 8, (descriptor >> 24 & 31) * 16
        self.a_transposed, self.b_transposed = bool(descriptor >> 15 & 1), bool(descriptor >> 16 & 1)
        self.size = 4 if is_tf32 else 2
        self.k = 32 // self.size
        self.type_a = "tf32" if is_tf32 else ("bf16" if descriptor >> 7 & 7 else "f16")
        self.type_b = "tf32" if is_tf32 else ("bf16" if descriptor >> 10 & 7 else "f16")
        if descriptor >> 4 & 3 != 1:
            raise UnsupportedPTX("an accumulator that is not float32")

    def lanes(self) -> np.ndarray:
        """The lane of tensor memory of each row: a product of 64 rows uses 16 of each warp's lanes."""
        row = np.arange(self.m)
        return row if self.m == TENSOR_LANES else row // 16 * 32 + row % 16

    def from_shared(self, shared, descriptor, rows, type_name, is_transposed):
        mode = SWIZZLE_MODES[descriptor >> 61 & 7]
        common = (descriptor & ((1 << 61) - 1) & ~(7 << 46)) | mode << 62
        addresses = element_addresses(common, rows, self.k, self.size, is_transposed)
        return read_matrix(shared, addresses, type_name)

    def from_tensor_memory(self, memory, place):
        column = place & 0xFFFF
        words = memory[self.lanes()][:, column : column + self.k * self.size // 4]
        data = np.ascontiguousarray(words).view(np.uint8).reshape(self.m, self.k, self.size)
        return values_of(data, self.type_a)
