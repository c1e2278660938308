//! Interfaces, their addresses, the way out, and who answers names: what has to be mapped when the machine starts
//! elsewhere.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::system::SystemRoot;

/// Interfaces that are listed; machines with containers have many that come and go.
const INTERFACES_MAX: usize = 256;
/// Addresses and routes that are listed.
const ADDRESSES_MAX: usize = 1024;

/// The machine's networks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Interfaces that have hardware behind them, or an address.
    pub interfaces: Vec<Interface>,
    /// The ways to everywhere else.
    pub default_routes: Vec<Route>,
    /// Who is asked for names.
    pub name_servers: Vec<String>,
    /// Where names without a dot are looked for.
    pub search_domains: Vec<String>,
}

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its hardware address.
    pub mac: String,
    /// Its driver; empty for one without hardware.
    pub driver: String,
    /// Its longest packet in bytes.
    pub mtu_bytes: u64,
    /// The bridge or bond that it belongs to; empty: none.
    pub master: String,
    /// Addresses with the length of their network, IPv4 first. Link-local ones are left out.
    pub addresses: Vec<String>,
}

/// A way out.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Route {
    /// The interface.
    pub interface: String,
    /// The next router; none if the network itself is everything.
    pub gateway: Option<IpAddr>,
    /// Smaller ones are preferred.
    pub metric: u32,
}

pub(super) fn read(root: &SystemRoot) -> Network {
    let routes = root.text("/proc/net/route").map(|text| parse_routes(&text)).unwrap_or_default();
    let local = root.text("/proc/net/fib_trie").map(|text| parse_local(&text)).unwrap_or_default();
    let six = root.text("/proc/net/if_inet6").map(|text| parse_six(&text)).unwrap_or_default();
    let mut interfaces = Vec::new();
    for name in root.names("/sys/class/net") {
        let folder = format!("/sys/class/net/{name}");
        let four = local.iter().filter_map(|address| Some((address, network_of(*address, &routes)?)));
        let four = four.filter(|(_, route)| route.interface == name);
        let mut addresses: Vec<String> = four.map(|(address, route)| format!("{address}/{}", route.bits())).collect();
        addresses.extend(six.iter().filter(|(interface, _)| *interface == name).map(|(_, address)| address.clone()));
        let driver = root.link_name(format!("{folder}/device/driver")).unwrap_or_default();
        if name == "lo" || (driver.is_empty() && addresses.is_empty()) {
            continue;
        }
        interfaces.push(Interface {
            mac: root.value(format!("{folder}/address")).unwrap_or_default(),
            mtu_bytes: root.number(format!("{folder}/mtu")).unwrap_or(0),
            master: root.link_name(format!("{folder}/master")).unwrap_or_default(),
            driver,
            addresses,
            name,
        });
    }
    interfaces.truncate(INTERFACES_MAX);
    let mut default_routes: Vec<Route> = routes.iter().filter(|route| route.mask == 0).map(Entry::route).collect();
    default_routes.extend(root.text("/proc/net/ipv6_route").map(|text| parse_six_routes(&text)).unwrap_or_default());
    default_routes.sort_unstable();
    default_routes.dedup();
    let (name_servers, search_domains) = name_servers(root);
    Network { interfaces, default_routes, name_servers, search_domains }
}

/// A line of `/proc/net/route`.
struct Entry {
    interface: String,
    destination: u32,
    gateway: u32,
    mask: u32,
    metric: u32,
}

impl Entry {
    fn bits(&self) -> u32 {
        self.mask.count_ones()
    }

    fn route(&self) -> Route {
        let gateway = (self.gateway != 0).then(|| IpAddr::V4(Ipv4Addr::from(self.gateway)));
        Route { interface: self.interface.clone(), gateway, metric: self.metric }
    }
}

/// Addresses stand there as the bytes of memory: the first part last, on a machine with the usual order.
fn parse_routes(text: &str) -> Vec<Entry> {
    let parse = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [interface, destination, gateway, flags, _, _, metric, mask, ..] = fields[..] else { return None };
        let hex = |text: &str| u32::from_str_radix(text, 16).ok();
        // Routes that are up.
        (hex(flags)? & 1 == 1).then_some(())?;
        Some(Entry {
            interface: interface.to_owned(),
            destination: hex(destination)?.swap_bytes(),
            gateway: hex(gateway)?.swap_bytes(),
            mask: hex(mask)?.swap_bytes(),
            metric: metric.parse().ok()?,
        })
    };
    text.lines().skip(1).filter_map(parse).take(ADDRESSES_MAX).collect()
}

/// Addresses of this machine: leaves of the local table of `/proc/net/fib_trie` that say `host LOCAL`.
fn parse_local(text: &str) -> BTreeSet<Ipv4Addr> {
    let (mut found, mut last) = (BTreeSet::new(), None);
    for line in text.lines() {
        let line = line.trim();
        if let Some(leaf) = line.strip_prefix("|-- ") {
            last = leaf.parse().ok();
        } else if line == "/32 host LOCAL"
            && let Some(address) = last.filter(|address: &Ipv4Addr| !address.is_loopback())
            && found.len() < ADDRESSES_MAX
        {
            found.insert(address);
        }
    }
    found
}

/// The network that an address lies in: the route without a gateway that fits it best.
fn network_of(address: Ipv4Addr, routes: &[Entry]) -> Option<&Entry> {
    let address = u32::from(address);
    let fits = |route: &&Entry| route.gateway == 0 && route.mask != 0 && address & route.mask == route.destination;
    routes.iter().filter(fits).max_by_key(|route| route.bits())
}

/// `/proc/net/if_inet6`: address, number, length, scope, flags, name. Without those of the link, which are made of the
/// hardware address.
fn parse_six(text: &str) -> Vec<(String, String)> {
    let parse = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [address, _, bits, scope, _, name] = fields[..] else { return None };
        let address = Ipv6Addr::from(u128::from_str_radix(address, 16).ok()?);
        let bits = u8::from_str_radix(bits, 16).ok()?;
        (scope == "00").then(|| (name.to_owned(), format!("{address}/{bits}")))
    };
    text.lines().filter_map(parse).take(ADDRESSES_MAX).collect()
}

/// `/proc/net/ipv6_route`: the routes to everywhere that lead through a router.
fn parse_six_routes(text: &str) -> Vec<Route> {
    let parse = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [destination, bits, _, _, gateway, metric, _, _, _, interface] = fields[..] else { return None };
        let hex = |text: &str| u128::from_str_radix(text, 16).ok();
        let gateway = Ipv6Addr::from(hex(gateway)?);
        let metric = u32::from_str_radix(metric, 16).ok()?;
        let is_way_out = hex(destination)? == 0 && bits == "00" && !gateway.is_unspecified() && interface != "lo";
        is_way_out.then(|| Route { interface: interface.to_owned(), gateway: Some(gateway.into()), metric })
    };
    text.lines().filter_map(parse).take(ADDRESSES_MAX).collect()
}

/// From `resolv.conf`; a resolver on this machine is asked for those behind it.
fn name_servers(root: &SystemRoot) -> (Vec<String>, Vec<String>) {
    let text = root.text("/etc/resolv.conf").unwrap_or_default();
    let (servers, domains) = parse_resolver(&text);
    if servers.iter().all(|server| server.starts_with("127.")) {
        let behind = root.text("/run/systemd/resolve/resolv.conf").map(|text| parse_resolver(&text));
        if let Some(behind) = behind.filter(|(servers, _)| !servers.is_empty()) {
            return behind;
        }
    }
    (servers, domains)
}

fn parse_resolver(text: &str) -> (Vec<String>, Vec<String>) {
    let words = |line: &str, key: &str| {
        let mut words = line.split_ascii_whitespace();
        let found = words.next() == Some(key);
        words.filter(|_| found).map(|word| super::platform::shortened(word.to_owned())).collect::<Vec<_>>()
    };
    let servers = text.lines().flat_map(|line| words(line, "nameserver")).take(16).collect();
    let domains = text.lines().flat_map(|line| words(line, "search")).take(64).collect();
    (servers, domains)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn routes_and_addresses_are_read() {
        let text = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
            ens3\t00000000\t0100000A\t0003\t0\t0\t100\t00000000\t0\t0\t0\n\
            ens3\t0000000A\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0\n\
            ens4\t0001000A\t00000000\t0001\t0\t0\t0\t80FFFFFF\t0\t0\t0\n\
            down\t0001000A\t00000000\t0000\t0\t0\t0\t80FFFFFF\t0\t0\t0\n";
        let routes = parse_routes(text);
        assert_eq!(routes.len(), 3);
        assert_eq!(routes[0].route().gateway, Some("10.0.0.1".parse().expect("an address")));
        let network = |address: &str| {
            network_of(address.parse().expect("an address"), &routes).map(|route| (&*route.interface, route.bits()))
        };
        assert_eq!(network("10.0.0.17"), Some(("ens3", 24)));
        assert_eq!(network("10.0.1.5"), Some(("ens4", 25)));
        assert_eq!(network("10.0.1.200"), None);
        let six = parse_six(
            "fd00000000000000000000000000beef 02 40 00 80     ens3\nfe80000000000000505400fffe123456 02 40 20 80     ens3\n",
        );
        assert_eq!(six, [("ens3".to_owned(), "fd00::beef/64".to_owned())]);
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text: String, lines in prop::collection::vec("([0-9a-fA-FzZ|/-]{0,33}[ \t]{1,2}){0,12}", 0..5)) {
            for text in [text, lines.join("\n")] {
                let routes = parse_routes(&text);
                for address in parse_local(&text) {
                    network_of(address, &routes).map(Entry::bits);
                }
                parse_six(&text);
                parse_six_routes(&text);
                parse_resolver(&text);
            }
        }
    }
}
