"""Data sets of images and text, their partition over the clients, and its statistics; instruction data as sequences."""

from fedjax_qp.data import leaf  # noqa: F401  (it registers itself)
from fedjax_qp.data.client_tests import match, own_counts
from fedjax_qp.data.dataset import Dataset, check_dataset
from fedjax_qp.data.examples import Examples
from fedjax_qp.data.images.sources import sources
from fedjax_qp.data.partition import check_partition, hold_out, partitions
from fedjax_qp.data.statistics import PartitionSummary, label_counts, plot_partition, print_table, summary
from fedjax_qp.data.text import shakespeare  # noqa: F401  (likewise)
from fedjax_qp.data.text.characters import character_sources
from fedjax_qp.data.text.instructions import Instructions, Record, Records, instruction_sources
from fedjax_qp.data.text.sequences import Encoded, Sequences, encode, pack, padding_share
from fedjax_qp.data.text.templates import render, tokenise

__all__ = [
    "Dataset",
    "Encoded",
    "Examples",
    "Instructions",
    "PartitionSummary",
    "Record",
    "Records",
    "Sequences",
    "character_sources",
    "check_dataset",
    "check_partition",
    "encode",
    "hold_out",
    "instruction_sources",
    "label_counts",
    "match",
    "own_counts",
    "pack",
    "padding_share",
    "partitions",
    "plot_partition",
    "print_table",
    "render",
    "sources",
    "summary",
    "tokenise",
]
