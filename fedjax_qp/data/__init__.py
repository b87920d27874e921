"""Data sets, their partition over the clients, and statistics of a partition."""

from fedjax_qp.data.examples import Examples
from fedjax_qp.data.partition import check_partition, partitions
from fedjax_qp.data.sources import Dataset, sources
from fedjax_qp.data.statistics import PartitionSummary, label_counts, plot_partition, print_table, summary

__all__ = [
    "Dataset",
    "Examples",
    "PartitionSummary",
    "check_partition",
    "label_counts",
    "partitions",
    "plot_partition",
    "print_table",
    "sources",
    "summary",
]
