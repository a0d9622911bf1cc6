"""An experiment runner for parameter-efficient tuning of language models, with IAPT at its centre."""
