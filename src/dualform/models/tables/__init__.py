"""How other libraries call the parameters and sizes of models, one file for each library."""
