"""Networks and what is trained of them: adapters, students, averages, the optimizer."""
