#![no_main]

farshore_fuzz::target!(nbd::fuzz::nbd_client);
