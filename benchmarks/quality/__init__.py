"""What the objectives' features are worth: many short trainings, with intervals over seeds."""
