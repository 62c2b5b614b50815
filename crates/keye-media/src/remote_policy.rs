//! Where `http(s)://` sources may lead, for servers that fetch what strangers name.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Which hosts may be fetched from. It is asked where names become addresses, for the first URL and for every redirect, and
/// the connection goes to the very addresses that were checked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RemotePolicy {
    /// Only these hosts and those below them (`example.org` allows `cdn.example.org`); empty allows every name.
    pub domains: Vec<String>,
    /// `(host, port)` pairs that are allowed whatever their address is.
    pub hosts: Vec<(String, u16)>,
    /// Nothing but `hosts`.
    pub only_hosts: bool,
}

impl RemotePolicy {
    /// Checks a host with the addresses that its name has; `host` is without the brackets of IPv6.
    ///
    /// # Errors
    /// The rule that is broken. A name with one address that is not public is refused with all of its addresses.
    pub fn check(&self, host: &str, port: u16, addresses: impl IntoIterator<Item = IpAddr>) -> Result<(), String> {
        let host = host.trim_start_matches('[').trim_end_matches(']').trim_end_matches('.').to_ascii_lowercase();
        if self.hosts.iter().any(|(name, at)| name.eq_ignore_ascii_case(&host) && *at == port) {
            return Ok(());
        }
        if self.only_hosts {
            return Err(format!("{host} port {port} is not among the hosts that media may come from"));
        }
        let below = |domain: &String| {
            let domain = domain.to_ascii_lowercase();
            host.strip_suffix(&domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        if !self.domains.is_empty() && !self.domains.iter().any(below) {
            return Err(format!("{host} is not among the domains that media may come from"));
        }
        match addresses.into_iter().all(is_global) {
            true => Ok(()),
            // The address is not told: that would make the server a way to look names up.
            false => Err(format!("{host} has an address that is not public")),
        }
    }
}

/// Whether an address is reachable from anywhere and belongs to one host (IANA special-purpose registries).
pub fn is_global(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => is_global_v4(v4),
        IpAddr::V6(v6) => is_global_v6(v6),
    }
}

fn is_global_v4(v4: Ipv4Addr) -> bool {
    let [a, b, c, _] = v4.octets();
    let special = match (a, b, c) {
        // This network, private, loopback, link-local.
        (0 | 10 | 127, ..) | (169, 254, _) | (172, 16..=31, _) | (192, 168, _) => true,
        // Shared address space of carriers.
        (100, 64..=127, _) => true,
        // Protocol assignments, documentation, 6to4 relays, AMT, AS112, benchmarks.
        (192, 0, 0 | 2) | (198, 51, 100) | (203, 0, 113) | (192, 88, 99) | (192, 52, 193) | (192, 31, 196) => true,
        (192, 175, 48) | (198, 18..=19, _) => true,
        // Multicast, reserved, broadcast.
        (224.., ..) => true,
        _ => false,
    };
    !special
}

fn is_global_v6(v6: Ipv6Addr) -> bool {
    let s = v6.segments();
    match s {
        // NAT64: global when the IPv4 address in it is.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => is_global_v4(joined(high, low)),
        // Only 2000::/3 is handed out; that leaves out mapped and compatible IPv4, loopback, unique local (fc00::/7),
        // link-local (fe80::/10), site-local and multicast.
        [0x2000..=0x3fff, ..] => match s {
            // Protocol assignments with Teredo and ORCHID, and documentation.
            [0x2001, 0..=0x1ff, ..] | [0x2001, 0xdb8, ..] | [0x3fff, 0..=0xfff, ..] => false,
            // 6to4: global when the IPv4 address in it is.
            [0x2002, high, low, ..] => is_global_v4(joined(high, low)),
            _ => true,
        },
        _ => false,
    }
}

fn joined(high: u16, low: u16) -> Ipv4Addr {
    Ipv4Addr::from((u32::from(high) << 16) | u32::from(low))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_public_addresses() {
        for text in ["8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "64:ff9b::808:808"] {
            assert!(is_global(text.parse().unwrap()), "{text}");
        }
        for text in [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "127.0.0.1",
            "127.9.9.9",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.9.9",
            "192.0.0.1",
            "192.0.2.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.51.100.7",
            "203.0.113.7",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:8.8.8.8",
            "::ffff:127.0.0.1",
            "::7f00:1",
            "fe80::1",
            "fc00::1",
            "fd12::1",
            "fec0::1",
            "ff02::1",
            "2001:db8::1",
            "2001::1",
            "2002:7f00:1::",
            "2002:a9fe:a9fe::",
            "64:ff9b::7f00:1",
            "64:ff9b::a00:1",
            "64:ff9b:1::1",
            "100::1",
            "5f00::1",
        ] {
            assert!(!is_global(text.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn names_and_ports() {
        let public = || ["8.8.8.8".parse().unwrap()];
        let mixed = || ["8.8.8.8".parse().unwrap(), "10.0.0.1".parse().unwrap()];
        let open = RemotePolicy::default();
        assert_eq!(open.check("example.org", 80, public()), Ok(()));
        assert!(open.check("example.org", 80, mixed()).unwrap_err().contains("not public"));
        let listed = RemotePolicy {
            domains: vec!["Example.org".into()],
            hosts: vec![("nas".into(), 8080)],
            ..RemotePolicy::default()
        };
        for host in ["example.org", "CDN.example.org", "example.org."] {
            assert_eq!(listed.check(host, 443, public()), Ok(()), "{host}");
        }
        for host in ["badexample.org", "example.org.evil.net", "org"] {
            assert!(listed.check(host, 443, public()).unwrap_err().contains("domains"), "{host}");
        }
        assert_eq!(listed.check("NAS", 8080, mixed()), Ok(()));
        assert!(listed.check("nas", 8081, mixed()).is_err());
        assert!(listed.check("example.org", 443, mixed()).is_err());
        let named = RemotePolicy { only_hosts: true, ..listed };
        assert_eq!(named.check("nas", 8080, mixed()), Ok(()));
        assert!(named.check("example.org", 443, public()).unwrap_err().contains("hosts"));
    }
}
