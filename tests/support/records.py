"""Made-up records of rounds."""


def made_records(first: int, last: int) -> list[dict]:
    return [
        {"round": n, "train_loss": 1 / n, "test_loss": None, "client_accuracy": {"q10": 0.5}, "class_accuracy": [1.0]}
        for n in range(first, last + 1)
    ]
