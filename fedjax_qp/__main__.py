"""`python -m fedjax_qp` is `fedjax-qp`."""

from fedjax_qp.terminal import guarded

with guarded():
    from fedjax_qp.cli import main

    main()
