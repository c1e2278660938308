#![no_main]

farshore_fuzz::target!(replication::fuzz::sender_events);
