"""What commands share: each step of the job, with what a person sees of it meanwhile."""
