"""wgmma (sm_90): products of a warpgroup whose operands lie in shared memory and that run beside the program.

Operands are read when the product is issued. Until wait_group lets the program go on, its accumulators read as NaN and
a write to its operands is a fault: so a wait that is missing or too weak shows.
"""

from dataclasses import dataclass, field

import numpy as np

from ..faults import PARTIAL_WARP, PTXFault, UnsupportedPTX
from ..operands import elements, reader, stacked_reader
from ..types import DTYPES, width
from .descriptors import element_addresses, element_bytes, read_matrix
from .registry import opcode
from .tensor_core import GROUP, LANES, PLACE, operand_values, shape_of

WARPGROUP = 128
IN_FLIGHT = np.uint32(0xFFFFFFFF)


@dataclass
class Product:
    """One product in flight: registers of its accumulator, granules of its operands."""

    registers: tuple[str, ...]
    granules: np.ndarray


@dataclass
class Products:
    """The products in flight of one block, in groups as they were committed."""

    results: dict[str, np.ndarray] = field(default_factory=dict)  # register -> what it will hold
    uncommitted: list[Product] = field(default_factory=list)
    groups: list[list[Product]] = field(default_factory=list)

    def issue(self, block, product: Product) -> None:
        self.uncommitted.append(product)
        for name in product.registers:
            block.registers[name].fill(IN_FLIGHT)
        block.shared.operand[product.granules] = True
        block.shared.any_operand = True

    def wait(self, block, allowed: int) -> None:
        self.groups = self.groups[len(self.groups) - allowed :] if allowed else []
        left = [product for group in [*self.groups, self.uncommitted] for product in group]
        held = {name for product in left for name in product.registers}
        for name in [name for name in self.results if name not in held]:
            block.registers[name][:] = self.results.pop(name)
        block.shared.operand.fill(False)
        for product in left:
            block.shared.operand[product.granules] = True
        block.shared.any_operand = bool(left)


def _products(block) -> Products:
    return block.state.setdefault("wgmma", Products())


def _check_warpgroups(block, mask) -> None:
    if mask is not None:
        lanes = mask.reshape(-1, WARPGROUP).sum(axis=1)
        if ((lanes > 0) & (lanes < WARPGROUP)).any():
            raise PTXFault(PARTIAL_WARP, "wgmma executed by only part of a warpgroup")
        raise UnsupportedPTX("wgmma in some of the warpgroups of a block")


@opcode("wgmma")
def decode_wgmma(block, instruction):
    what = instruction.opcode[1]
    if block.num_threads % WARPGROUP:
        raise UnsupportedPTX(f"wgmma in a block of {block.num_threads} threads")
    if what == "fence":
        return lambda mask: None
    if what == "mma_async":
        return _mma(block, instruction)
    if what not in ("commit_group", "wait_group"):
        raise UnsupportedPTX(f"wgmma.{what}")
    allowed = int(instruction.operands[0], 0) if what == "wait_group" else 0

    def execute(mask):
        _check_warpgroups(block, mask)
        products = _products(block)
        if what == "wait_group":
            products.wait(block, min(allowed, len(products.groups)))
        else:
            products.groups.append(products.uncommitted)
            products.uncommitted = []

    return execute


def _mma(block, instruction):
    _, n, k = shape_of(instruction)
    type_d, type_a, type_b = instruction.opcode[-3:]
    if type_a not in ("f16", "bf16", "tf32", "s8", "u8"):
        raise UnsupportedPTX(f"wgmma of .{type_a}")
    names = elements(instruction.operands[0])
    a_in_registers = instruction.operands[1].startswith("{")
    signs, transposed = _immediates(instruction, type_d, a_in_registers)
    read_a = (_registers_operand if a_in_registers else _shared_operand)(
        block, instruction.operands[1], type_a, 64, k, transposed[0]
    )
    read_b = _shared_operand(block, instruction.operands[2], type_b, n, k, transposed[1])
    accumulates = reader(block, instruction.operands[3], "pred")
    dtype = DTYPES[type_d]
    per_register = 32 // width(type_d)
    row, column = _accumulator_places(len(names) * per_register)

    def execute(mask):
        _check_warpgroups(block, mask)
        products = _products(block)
        current = np.stack([products.results.get(name, block.registers[name]) for name in names], 1)
        granules = []
        for first in range(0, block.num_threads, WARPGROUP):
            a, granules_a = read_a(first)
            b, granules_b = read_b(first)
            granules += [granules_a, granules_b]
            mine = slice(first, first + WARPGROUP)
            total = (a @ b.T * signs)[row, column]
            if accumulates()[first]:
                total = total + current[mine].view(dtype)
            current[mine] = total.astype(dtype).view(np.uint32)
        for number, name in enumerate(names):
            products.results[name] = current[:, number].copy()
        products.issue(block, Product(tuple(names), np.concatenate(granules)))

    return execute


def _immediates(instruction, type_d: str, a_in_registers: bool) -> tuple[int, tuple[bool, bool]]:
    """(sign of the product, whether A and B are transposed)."""
    if type_d == "s32":
        return 1, (False, False)
    numbers = [int(text, 0) for text in instruction.operands[4:]]
    transposed = [bool(number) for number in numbers[2:]]
    if a_in_registers:
        transposed = [False, *transposed]
    transposed += [False, False]
    return numbers[0] * numbers[1], (transposed[0], transposed[1])


def _accumulator_places(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of value [thread of the warpgroup, number]."""
    number = np.arange(count)[None, :]
    warp, group, place = np.arange(WARPGROUP)[:, None] // LANES, np.tile(GROUP, 4)[:, None], np.tile(PLACE, 4)[:, None]
    return 16 * warp + group + 8 * (number // 2 % 2), 8 * (number // 4) + 2 * place + number % 2


def _shared_operand(block, text, type_name, rows, columns, is_transposed):
    """A function: first thread of the warpgroup -> (matrix [rows, columns], its granules)."""
    read = reader(block, text, "b64")
    size = element_bytes(type_name)

    def operand(first):
        descriptors = read()[first : first + WARPGROUP]
        if (descriptors != descriptors[0]).any():
            raise PTXFault(PARTIAL_WARP, "the threads of a warpgroup have different matrix descriptors")
        addresses = element_addresses(int(descriptors[0]), rows, columns, size, is_transposed)
        return read_matrix(block.shared, addresses, type_name)

    return operand


def _registers_operand(block, text, type_name, rows, columns, is_transposed):
    """The same for A in registers, spread over the lanes as for mma.sync."""
    names = elements(text)
    read = stacked_reader(block, names, 32)
    per_register = 32 // (8 * element_bytes(type_name))
    register, element = np.arange(len(names))[None, :, None], np.arange(per_register)[None, None, :]
    warp, group, place = (np.arange(WARPGROUP) // LANES, np.tile(GROUP, 4), np.tile(PLACE, 4))
    row = (16 * warp + group)[:, None, None] + 8 * (register % 2) + 0 * element
    column = place[:, None, None] * per_register + element + 4 * per_register * (register // 2)

    def operand(first):
        packed = np.ascontiguousarray(read()[:, first : first + WARPGROUP].T)
        matrix = np.zeros((rows, columns), np.int64 if type_name in ("s8", "u8") else np.float64)
        matrix[row, column] = operand_values(packed, type_name)
        return matrix, np.zeros(0, np.int64)

    return operand
