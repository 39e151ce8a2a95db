"""The reasoning-gym tasks by name, and the difficulty levels of those most used. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# fmt: off
TASKS: tuple[str, ...] = (
    "ab", "acre", "advanced_geometry", "aiw", "arc_1d", "arc_agi", "base_conversion", "basic_arithmetic", "bf",
    "binary_alternation", "binary_matrix", "bitwise_arithmetic", "boxnet", "caesar_cipher", "calendar_arithmetic",
    "chain_sum", "circuit_logic", "codeio", "coin_flip", "color_cube_rotation", "complex_arithmetic", "composite",
    "count_bits", "count_primes", "countdown", "course_schedule", "cryptarithm", "decimal_arithmetic",
    "decimal_chain_sum", "dice", "emoji_mystery", "family_relationships", "figlet_font", "fraction_simplification",
    "futoshiki", "game_of_life", "game_of_life_halting", "gcd", "graph_color", "group_anagrams", "gsm_symbolic",
    "intermediate_integration", "isomorphic_strings", "jugs", "kakurasu", "knight_swap", "knights_knaves",
    "largest_island", "lcm", "leg_counting", "letter_counting", "letter_jumble", "list_functions", "mahjong_puzzle",
    "manipulate_matrix", "maze", "mini_sudoku", "modulo_grid", "n_queens", "needle_haystack", "number_filtering",
    "number_format", "number_sequence", "number_sorting", "palindrome_generation", "palindrome_partitioning",
    "path_star", "polynomial_equations", "polynomial_multiplication", "pool_matrix", "power_function",
    "prime_factorization", "products", "propositional_logic", "puzzle24", "quantum_lock", "ransom_note", "rearc",
    "rectangle_count", "rotate_matrix", "rotten_oranges", "rubiks_cube", "rush_hour", "self_reference",
    "sentence_reordering", "shortest_path", "simple_equations", "simple_geometry", "simple_integration", "sokoban",
    "spell_backward", "spiral_matrix", "string_insertion", "string_manipulation", "string_splitting",
    "string_synthesis", "sudoku", "survo", "syllogism", "time_intervals", "tower_of_hanoi", "tsumego",
    "word_ladder", "word_sequence_reversal", "word_sorting", "zebra_puzzles",
)
# fmt: on

Levels = Mapping[str, Mapping[str, Any]]


def _both(name: str, *values: int) -> dict[str, dict[str, Any]]:
    """A level a value: `min_name` and `max_name` are that value."""
    return {f"{v}-{name}": {f"min_{name}": v, f"max_{name}": v} for v in values}


def _with(levels: Levels, **common: Any) -> dict[str, dict[str, Any]]:
    return {level: {**options, **common} for level, options in levels.items()}


# What a task's categories are where the user sets no options: easy enough for a small model to start,
# from easy to hard. Every other task has the one category "default", with reasoning-gym's own settings.
LEVELS: dict[str, Levels] = {
    "basic_arithmetic": _with(_both("terms", 2, 3, 4), min_digits=1, max_digits=1),
    "chain_sum": _with(_both("terms", 2, 3, 4), min_digits=1, max_digits=1),
    "composite": {
        "default": {
            "datasets": [{"name": n, "weight": 1.0, "config": {}} for n in ("chain_sum", "number_sorting", "gcd")]
        }
    },
    "countdown": {
        f"to-{n}": {
            "min_numbers": 3,
            "max_numbers": 3,
            "min_value": 1,
            "max_value": n,
            "min_target": 1,
            "max_target": 30,
        }
        for n in (5, 9)
    },
    "futoshiki": _both("board_size", 4, 5, 6),
    "gcd": {f"to-{n}": {"min_value": 1, "max_value": n} for n in (20, 100, 1000)},
    "lcm": {f"to-{n}": {"min_value": 1, "max_value": n} for n in (10, 30, 100)},
    "letter_counting": _both("words", 1, 3, 6),
    "maze": {
        f"{n}x{n}": {"min_grid_size": n, "max_grid_size": n, "min_dist": 2, "max_dist": d}
        for n, d in ((5, 5), (7, 10), (9, 14))
    },
    "mini_sudoku": _both("empty", 4, 6, 8, 10),
    "number_sorting": _with(_both("numbers", 3, 5, 8), max_decimals=0, min_value=0.0, max_value=99.0),
    "products": _both("digits", 1, 2, 3),
    "shortest_path": {
        f"{n}x{n}": {"min_rows": n, "max_rows": n, "min_cols": n, "max_cols": n, "p_blocked": 0.3} for n in (4, 5, 7)
    },
    "simple_equations": _with(_both("terms", 2, 3), min_value=1, max_value=20),
    "spell_backward": _both("word_len", 3, 5, 7),
    "sudoku": _both("empty", 10, 20, 40),
}
