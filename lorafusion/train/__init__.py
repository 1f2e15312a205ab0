"""`lorafusion train jobs.yaml`: what it is told, and the workload and tokens that are made of that."""
