"""What finished runs say: comparisons, figures and an HTML report, made from their folders alone."""
