"""What people look at: figures with the data they show, the summary in the terminal, dashboards of wandb.

Everything here reads the measurement table and measures nothing.
"""
