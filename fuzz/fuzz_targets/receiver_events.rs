#![no_main]

farshore_fuzz::target!(replication::fuzz::receiver_events);
