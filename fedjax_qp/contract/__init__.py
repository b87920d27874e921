"""What every method promises the engine, as laws that can be checked: by this package's tests, and by `fedjax-qp check`."""

from fedjax_qp.contract.laws import Candidate, methods_laws

__all__ = ["Candidate", "methods_laws"]
