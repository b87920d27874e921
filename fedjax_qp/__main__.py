"""`python -m fedjax_qp` is `fedjax-qp`: both are guarded before anything else is imported."""

from fedjax_qp.console.terminal import guarded


def main() -> None:
    """Runs the command line."""
    with guarded():
        from fedjax_qp.cli import main as command

        command()


if __name__ == "__main__":
    main()
