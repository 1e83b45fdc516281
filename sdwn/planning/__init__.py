"""What is to be made, before anything is: the plan, and how it is shared out."""
