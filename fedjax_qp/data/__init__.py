"""Data sets of images, rows and text, their partition over the clients, and its statistics; instruction data as sequences.

Every file of this folder is imported: to add a source or a partition, write one that registers it.
"""

from fedjax_qp.data.client_tests import match, own_counts
from fedjax_qp.data.dataset import Dataset, check_dataset
from fedjax_qp.data.examples import Examples
from fedjax_qp.data.partition import check_partition, hold_out, partitions
from fedjax_qp.data.registry import sources
from fedjax_qp.data.statistics import PartitionSummary, label_counts, plot_partition, print_table, summary
from fedjax_qp.data.text.instructions import Instructions, Record, Records
from fedjax_qp.data.text.sequences import Encoded, Sequences, encode, pack, padding_share
from fedjax_qp.data.text.templates import render, tokenise
from fedjax_qp.registry import import_modules

__all__ = [
    "Dataset",
    "Encoded",
    "Examples",
    "Instructions",
    "PartitionSummary",
    "Record",
    "Records",
    "Sequences",
    "check_dataset",
    "check_partition",
    "encode",
    "hold_out",
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

import_modules(__name__, __path__)
