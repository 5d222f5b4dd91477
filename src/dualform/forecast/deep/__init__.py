"""Deep forecasters: quantiles by a network that has read many series, and series whose model a network writes."""
