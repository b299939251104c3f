//! Network cards: keys, values and rules.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::short::Short;
use crate::value::{Exposure, Id, NetType, Size, ValueError, Within, serde_as_text};
use crate::vm::{self, Backend, Device, Invalid, Kind, Names};

/// Network cards take slots from here on.
pub(crate) const FIRST_SLOT: u16 = 16;

/// A network card: on a tap of this host, or on passt.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Net {
    /// Where frames go, for what needs no name.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<NetType>,
    /// An existing tap of this host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap: Option<IfName>,
    /// Ports of this host that lead into the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forward: Option<Forwards>,
    /// The guest reaches services on this host's loopback at its gateway's address.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub host_loopback: bool,
    /// The program passt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub passt: Option<PathBuf>,
    /// Address of the guest, by default made from the names of VM and device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// Only frames from and to that address pass.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub mac_filter: bool,
    /// Largest IP packet; by default that of the tap, or 1500.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<Within<68, 65517>>,
    /// Number of queue pairs, by default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<Within<1, 64>>,
    /// Most bytes per second to the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_rate: Option<Size>,
    /// Most bytes at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_burst: Option<Size>,
    /// Most bytes per second from the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_rate: Option<Size>,
    /// Most bytes at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_burst: Option<Size>,
    /// Name in messages, by default `net` and the number of the card.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<Id>,
    /// PCI slot, by default 16 and the number of the card.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<Within<1, 31>>,
    /// How much of guest memory its back end sees.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Exposure>,
    /// Program to use in place of `anemone-net`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub binary: Option<PathBuf>,
}

impl Short for Net {
    const MAIN_KEY: Option<&'static str> = Some("type");
}

/// Name of a network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IfName(String);

impl IfName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn allowed() -> String {
        "the name of an interface: 1 to 15 characters without `/`, `:`, `%` and white space"
            .to_owned()
    }
}

impl fmt::Display for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for IfName {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        // A `%` would be a pattern to the kernel, which then makes a new interface.
        let bad = |c: char| c.is_whitespace() || c.is_control() || "/:%".contains(c);
        let valid =
            (1..=15).contains(&text.len()) && !text.contains(bad) && text != "." && text != "..";
        match valid {
            true => Ok(Self(text.to_owned())),
            false => Err(ValueError::new(text, Self::allowed())),
        }
    }
}

serde_as_text!(IfName);

/// MAC address of a network card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    fn allowed() -> String {
        "a unicast MAC address such as 02:00:00:00:00:01".to_owned()
    }

    /// The address of a card that has none: the same names give the same address, other names
    /// most probably another one. Locally administered.
    pub fn of(vm: &str, device: &str) -> Self {
        // FNV-1a, which stays the same for ever.
        let hash = [vm.as_bytes(), &[0], device.as_bytes()]
            .concat()
            .into_iter()
            .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
            });
        let [a, b, c, d, e, f, g, h] = hash.to_be_bytes();
        Self([0x02, a ^ f, b ^ g, c ^ h, d, e])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02x}", if number > 0 { ":" } else { "" })?;
        }
        Ok(())
    }
}

impl FromStr for Mac {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let error = || ValueError::new(text, Self::allowed());
        let parts: Vec<_> = text.split(':').collect();
        let digits = |part: &&str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
        if parts.len() != 6 || !parts.iter().all(digits) {
            return Err(error());
        }
        let mut mac = [0; 6];
        for (byte, part) in mac.iter_mut().zip(&parts) {
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        match mac[0] & 1 == 0 && mac != [0; 6] {
            true => Ok(Self(mac)),
            false => Err(error()),
        }
    }
}

serde_as_text!(Mac);

/// A protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of this host that leads into the guest, written `tcp:[ADDRESS:]PORT-PORT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forward {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Address of this host; loopback where none is written.
    pub address: IpAddr,
    /// Port of this host.
    pub host: u16,
    /// Port of the guest.
    pub guest: u16,
}

impl Forward {
    /// As passt's options have it.
    pub fn to_passt(self) -> String {
        format!("{}/{}:{}", self.address, self.host, self.guest)
    }

    fn parse(text: &str) -> Option<Self> {
        let (protocol, rest) = text.split_once(':')?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return None,
        };
        let (from, guest) = rest.rsplit_once('-')?;
        let (address, host) = match from.rsplit_once(':') {
            None => (IpAddr::V4(Ipv4Addr::LOCALHOST), from),
            Some((address, port)) => {
                let inner = address.strip_prefix('[').and_then(|a| a.strip_suffix(']'));
                let address = match inner {
                    Some(inner) => IpAddr::V6(inner.parse().ok()?),
                    None => IpAddr::V4(address.parse().ok()?),
                };
                (address, port)
            }
        };
        let port = |text: &str| {
            let digits = text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse().ok().filter(|port| digits && *port != 0)
        };
        Some(Self {
            protocol,
            address,
            host: port(host)?,
            guest: port(guest)?,
        })
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.protocol {
            Protocol::Tcp => "tcp:",
            Protocol::Udp => "udp:",
        })?;
        match self.address {
            IpAddr::V4(address) => write!(f, "{address}:")?,
            IpAddr::V6(address) => write!(f, "[{address}]:")?,
        }
        write!(f, "{}-{}", self.host, self.guest)
    }
}

/// Forwarded ports with `+` between them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forwards(pub Vec<Forward>);

impl Forwards {
    fn allowed() -> String {
        "tcp:[ADDRESS:]PORT-PORT or udp:…, host first, several with + between them, such as \
         tcp:8080-80+tcp:0.0.0.0:2222-22+udp:[::1]:53-53"
            .to_owned()
    }
}

impl fmt::Display for Forwards {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, forward) in self.0.iter().enumerate() {
            write!(f, "{}{forward}", if number > 0 { "+" } else { "" })?;
        }
        Ok(())
    }
}

impl FromStr for Forwards {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let rules: Option<Vec<_>> = text.split('+').map(Forward::parse).collect();
        rules
            .map(Self)
            .ok_or_else(|| ValueError::new(text, Self::allowed()))
    }
}

serde_as_text!(Forwards);

/// Where the frames of a card go.
#[derive(Debug, Clone, PartialEq)]
pub enum Uplink {
    /// An existing tap.
    Tap(IfName),
    /// passt.
    User {
        /// Forwarded ports.
        forward: Vec<Forward>,
        /// The gateway's address is this host's loopback.
        host_loopback: bool,
        /// The program.
        passt: Option<PathBuf>,
    },
}

/// What a card's process is told.
#[derive(Debug, Clone, PartialEq)]
pub struct Card {
    /// Where frames go.
    pub uplink: Uplink,
    /// Address of the guest.
    pub mac: Mac,
    /// Only frames from and to it pass.
    pub mac_filter: bool,
    /// Largest IP packet.
    pub mtu: Option<u16>,
    /// Queue pairs.
    pub pairs: u16,
    /// Option and bytes: the rates and bursts that are set.
    pub rates: Vec<(&'static str, u64)>,
}

/// Fills in the defaults of a card and checks it.
pub(crate) fn resolve(
    net: &mut Net,
    vm: &str,
    number: u16,
    names: &mut Names,
) -> Result<Device, Invalid> {
    let id = names.take_id(&mut net.id, &format!("net{number}"))?;
    let owner = || id.to_string();
    let meaningless = |key, because| Invalid::Meaningless {
        owner: owner(),
        key,
        because,
    };
    for (key, path) in [("passt", &net.passt), ("binary", &net.binary)] {
        vm::refuse_empty(&format!("{id}: {key}"), path.as_deref())?;
    }
    let uplink = match (net.kind, &net.tap) {
        (None, None) => return Err(Invalid::NoUplink(owner())),
        (Some(_), Some(_)) => {
            return Err(Invalid::Conflict {
                owner: owner(),
                keys: "`type` (user) and `tap`",
            });
        }
        (None, Some(tap)) => {
            let user = "beside `tap`: it belongs to type `user`";
            let own: [(&'static str, bool); 3] = [
                ("forward", net.forward.is_some()),
                ("host-loopback", net.host_loopback),
                ("passt", net.passt.is_some()),
            ];
            if let Some((key, _)) = own.into_iter().find(|(_, given)| *given) {
                return Err(meaningless(key, user));
            }
            Uplink::Tap(tap.clone())
        }
        (Some(NetType::User), None) => {
            if net.queues.is_some_and(|queues| queues.get() > 1) {
                return Err(meaningless(
                    "queues",
                    "with type `user`, which has one queue pair",
                ));
            }
            Uplink::User {
                forward: net.forward.clone().map(|f| f.0).unwrap_or_default(),
                host_loopback: net.host_loopback,
                passt: net.passt.clone(),
            }
        }
    };
    let mut rates = Vec::new();
    for (key, option, value) in [
        ("rx-rate", "--rx-rate", net.rx_rate),
        ("rx-burst", "--rx-burst", net.rx_burst),
        ("tx-rate", "--tx-rate", net.tx_rate),
        ("tx-burst", "--tx-burst", net.tx_burst),
    ] {
        match value {
            Some(Size(0)) => {
                return Err(meaningless(key, "when it is 0; leave it out for no limit"));
            }
            Some(Size(bytes)) => rates.push((option, bytes)),
            None => {}
        }
    }
    for (key, burst, rate) in [
        ("rx-burst", net.rx_burst, net.rx_rate),
        ("tx-burst", net.tx_burst, net.tx_rate),
    ] {
        if burst.is_some() && rate.is_none() {
            return Err(meaningless(key, "without a rate"));
        }
    }
    let mac = *net.mac.get_or_insert_with(|| Mac::of(vm, id.as_str()));
    let pairs = net.queues.get_or_insert(Within::min()).get();
    let slot = names.take_slot(&id, &mut net.slot, FIRST_SLOT.saturating_add(number))?;
    // What has several pairs or a filter has a control queue as well (virtio 1.3, 5.1.2).
    let control = u16::from(pairs > 1 || net.mac_filter);
    let backend = Backend::Process(net.binary.clone());
    let kind = Kind::Net(Card {
        uplink,
        mac,
        mac_filter: net.mac_filter,
        mtu: net.mtu.map(Within::get),
        pairs,
        rates,
    });
    Ok(Device {
        slot,
        queues: 2 * pairs + control,
        memory: vm::exposure(&mut net.memory, &kind, &backend),
        backend,
        kind,
        id,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwarded_ports() {
        for (text, passt) in [
            ("tcp:8080-80", "127.0.0.1/8080:80"),
            ("tcp:0.0.0.0:2222-22", "0.0.0.0/2222:22"),
            ("udp:[::1]:53-5353", "::1/53:5353"),
        ] {
            let forwards: Forwards = text.parse().unwrap();
            assert_eq!(forwards.0[0].to_passt(), passt);
            assert_eq!(forwards.to_string().parse(), Ok(forwards));
        }
        let two: Forwards = "tcp:1-2+udp:3-4".parse().unwrap();
        assert_eq!(two.to_string(), "tcp:127.0.0.1:1-2+udp:127.0.0.1:3-4");
        for wrong in [
            "",
            "tcp",
            "tcp:",
            "tcp:80",
            "sctp:1-2",
            "tcp:0-80",
            "tcp:80-0",
            "tcp:65536-1",
            "tcp:+1-2",
            "tcp:host:1-2",
            "tcp:::1:1-2",
            "tcp:[127.0.0.1]:1-2",
            "tcp:1-2+",
            "tcp:1-2-3",
            "tcp:1.2.3.4:-5",
        ] {
            let error = wrong.parse::<Forwards>().unwrap_err();
            assert_eq!(error.found, wrong);
        }
    }

    #[test]
    fn addresses() {
        let mac = Mac::of("web", "net0");
        assert_eq!(mac, Mac::of("web", "net0"));
        assert_ne!(mac, Mac::of("web", "net1"));
        assert_ne!(mac, Mac::of("webnet", "0"));
        assert_eq!(mac.to_string().parse(), Ok(mac));
        // It must never change: guests know their cards by it.
        assert_eq!(Mac::of("", "net0").to_string(), "02:05:49:79:59:1a");
        for wrong in [
            "",
            "01:00:00:00:00:00",
            "00:00:00:00:00:00",
            "2:0:0:0:0:1",
            "x",
        ] {
            assert!(wrong.parse::<Mac>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn names_of_interfaces() {
        for good in ["tap0", "vm-1.2", "a"] {
            assert_eq!(good.parse::<IfName>().unwrap().as_str(), good);
        }
        for bad in ["", "tap%d", "a/b", "a b", "sixteencharacter", "..", "a:1"] {
            assert!(bad.parse::<IfName>().is_err(), "{bad}");
        }
    }
}
